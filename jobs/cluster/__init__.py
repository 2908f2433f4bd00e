"""Jobs on a Ray cluster: packaging, submission, following, Kubernetes manifests."""
