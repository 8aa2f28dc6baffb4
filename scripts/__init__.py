"""The commands; ``command`` is what each begins with."""
