"""Memory forecast: will a run fit the card, before the card is rented."""
