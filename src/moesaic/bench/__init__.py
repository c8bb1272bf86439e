"""How fast, and how large in memory, beside others and beside the limit: cases, contenders and honest clocks."""
