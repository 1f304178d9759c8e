"""Pages of HTML that need nothing else, and the colours of everything that is drawn."""
