"""What tests of every kind share: the server as a process, a QMP client, QEMU's image tools as oracles."""
