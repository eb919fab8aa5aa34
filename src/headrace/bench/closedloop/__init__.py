"""The closed loop: engines take turns at the same batches, each in a process of its own."""
