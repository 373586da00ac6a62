"""Introspection: what query-qmp-schema answers, derived from the registry."""

from __future__ import annotations

from nbd_backend.control.schema.introspection import encoded_schema, introspect

__all__ = ["encoded_schema", "introspect"]
