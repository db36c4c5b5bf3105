"""What travels between roles and between peers: length-prefixed frames and what is in them."""
