"""The QMP server: management over a unix socket that existing QMP clients can talk to.

    scanner.py    bytes -> JSON messages: framing, limits, recovery      no I/O
    protocol.py   JSON messages -> requests; results -> bytes            no I/O
    session.py    one monitor: negotiation, order, backpressure
    server.py     listening sockets and their monitors
    registry.py   commands and events, found in commands/
    arguments.py  argument structs and the texts of their errors
    events.py     the bus that carries events to every monitor
    schema/       introspection, derived from the structs

Everything runs on one event loop thread.
"""
