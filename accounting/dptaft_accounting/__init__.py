"""Privacy accounting for convex and general training mechanisms; never imports torch."""
