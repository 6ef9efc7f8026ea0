"""Roundings chosen column by column: each column compensates the error of earlier ones, without gradient descent."""
