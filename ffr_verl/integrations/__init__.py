"""What ties the package to other frameworks, one folder or file each."""
