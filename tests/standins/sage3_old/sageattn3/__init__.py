"""Stand-in for early builds of SageAttention 3, which export nothing from the package itself."""
