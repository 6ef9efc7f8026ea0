"""Roundings chosen column by column, each making up for the error of those before it; nothing is learned by descent."""
