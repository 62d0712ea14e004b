"""What ties the package to verl."""
