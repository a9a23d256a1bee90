cd "$1"
for i in 1 2 3 4 5 6 7 8; do echo "int f$i(void) { return $i; }" > "f$i.c"; done
printf '#include <stdio.h>\nint f8(void); int main(void) { printf("%%d\\n", f8()); }\n' > main.c
printf 'OBJECTS = $(patsubst %%.c,%%.o,$(wildcard *.c))\nprogram: $(OBJECTS)\n\t$(CC) -o $@ $^\n' > Makefile
make -s -j2
test "$(./program)" = 8
