"""What a run leaves and how sure it is: folders, tables, intervals. numpy and pandas only."""
