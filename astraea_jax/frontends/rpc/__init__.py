"""The gRPC front door: JetStream's wire contract, server and client."""
