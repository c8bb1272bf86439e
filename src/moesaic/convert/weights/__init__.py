"""The maths of experts and networks, free of names: cut, copy, cluster, line up, average."""
