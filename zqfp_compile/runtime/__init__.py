"""Running what a compile made: engines behind one interface, and text out of them."""
