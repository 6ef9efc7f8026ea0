"""Integer programs and the files other tools read: what is exported is what was simulated."""
