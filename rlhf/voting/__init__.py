"""What people's votes on pairs of answers say about the policies that gave them."""
