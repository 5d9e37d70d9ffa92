"""How to bound a mechanism: composition, Renyi, last iterate, selection."""
