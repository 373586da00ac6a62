"""One module per family of commands; registry.py finds them, so that a new one is only a new file."""
