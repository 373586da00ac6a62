"""A block device backend in userspace: live qcow2 chains over NBD, block jobs over QMP."""

__version__ = "0.1.0"
