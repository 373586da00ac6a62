"""The qcow2 format at rest: header, extensions, creation."""
