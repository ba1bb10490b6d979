"""HTTP/1.1: connections, the routes of the protocol, and the page that describes them."""
