"""What a study of many points costs to report and to open."""
