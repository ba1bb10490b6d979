"""Work spread over the machines of a Ray cluster: scans, searches, builds."""
