cd "$1"
git init -q repository
cd repository
git config user.email somebody@example.org
git config user.name somebody
for i in $(seq 50); do echo "$i" > "file$i"; done
git add .
git commit -qm one
cd ..
git clone -q repository copy
cd copy
git fsck --strict --no-progress
git diff --exit-code
