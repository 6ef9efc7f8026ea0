"""Services of the operating system: locks, processes, memory, files."""
