"""Reports on finished runs for people: Markdown, a self-contained page, a model card, a registry entry."""
