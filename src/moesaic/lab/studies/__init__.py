"""Two studies of what experts take, on real text: three domains under two kinds of balance, and 57 school subjects."""
