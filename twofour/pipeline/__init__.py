"""A recipe carried through all stages, reused where nothing changed, and judged."""
