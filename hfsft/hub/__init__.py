"""What is on the Hub, and sending there with bounds and retries."""
