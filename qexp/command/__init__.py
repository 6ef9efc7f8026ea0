"""What a user types, judged before anything runs."""
