"""What a run leaves: its names, its folders, its tables. Import the module that is needed."""
