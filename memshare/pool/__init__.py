"""The pool: where memories live."""
