cd "$1"
cargo init -q --vcs none --name small
echo '#[test] fn holds() { assert_eq!(1 + 1, 2); }' >> src/main.rs
cargo run -q --offline | grep Hello
cargo test -q --offline
