"""What a layer remembers: its blocks, which of them a query reads, and at which positions."""
