"""What is the operating system's: locks, processes, memory, files."""
