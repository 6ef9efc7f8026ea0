"""Checks the user's command line and configuration before anything runs."""
