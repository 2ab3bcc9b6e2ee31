"""What answers the turns of a trajectory: environments and tools, in a process of their own."""
