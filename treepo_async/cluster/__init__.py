"""The conductor: places the roles with Ray, supervises them and tells a person what happens."""
