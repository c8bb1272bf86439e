"""Where models keep their networks and experts, found out by building and trying them."""
