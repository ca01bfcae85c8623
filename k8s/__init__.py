"""captune on Kubernetes: the image, the manifests (Kustomize), and what turns a recipe's needs into their numbers."""
