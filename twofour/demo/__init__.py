"""The whole flow on data that comes with a package: what `twofour demo` and the examples run."""
