"""How a solve is run and differentiated."""
