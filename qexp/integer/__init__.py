"""Integer programs and the files that other tools read; an export computes exactly what was simulated."""
