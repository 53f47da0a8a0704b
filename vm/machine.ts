/** A kernel in QEMU with this build and what it needs as its whole file system, in memory. No device but two serial lines, no disk, no network. */
import {spawn} from 'node:child_process';
import {createInterface} from 'node:readline';
import {chmodSync, cpSync, existsSync, mkdirSync, mkdtempSync, readFileSync, rmSync, writeFileSync} from 'node:fs';
import {constants, setPriority, tmpdir} from 'node:os';
import path from 'node:path';
import {fileURLToPath} from 'node:url';
import {must} from '../test/helpers/process.js';
import {archive, type Kernel} from './kernels.js';

const ROOT = fileURLToPath(new URL('../..', import.meta.url));
const MEMORY_MIB = 3072;

/** The second serial line carries what the command says, the first the kernel's own words. */
const INIT = (command: string) => `#!/bin/busybox sh
/bin/busybox --install -s /bin
export PATH=/bin:/usr/sbin HOME=/root
mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t devtmpfs devtmpfs /dev
mount -t tmpfs tmpfs /tmp
mount -t cgroup2 cgroup2 /sys/fs/cgroup
mount -t bpf bpf /sys/fs/bpf
ln -s /proc/self/fd /dev/fd
for module in /modules/*; do insmod $module || echo "insmod $module failed"; done
ip link set lo up
ulimit -n 65536
ulimit -l unlimited
stty raw -F /dev/ttyS1
${command} > /dev/ttyS1
echo "ended with $?" > /dev/ttyS1
poweroff -f
`;

/** Node, `ip`, busybox, this build, and the libraries of them all, each where it is here. */
export class Userland {
	readonly directory = mkdtempSync(path.join(tmpdir(), 'sidestep-vm-'));
	readonly #archive = path.join(this.directory, 'userland.cpio');

	/** @param command - what the machine is for; a path in it begins at the project's root. */
	constructor(command: string) {
		try {
			this.#build(command);
		} catch (error) {
			this.remove();
			throw error;
		}
	}

	#build(command: string): void {
		const image = path.join(this.directory, 'image');
		for (const directory of ['bin', 'proc', 'sys', 'dev', 'tmp', 'run', 'root', 'etc', 'usr/sbin']) {
			mkdirSync(path.join(image, directory), {recursive: true});
		}

		const libraries = (...programs: readonly string[]) => must('ldd', ...programs).split('\n').flatMap(line => /(\/\S+) \(/.exec(line)?.[1] ?? []);
		const tools = ['busybox', 'ip'].map(name => must('sh', '-c', `readlink -f "$(command -v ${name})"`).trim()) as [string, string];
		const built = ['build/Release/sidestep.node', 'build/test', 'build/sidestep.bpf.o', 'dist', 'package.json'].map(name => path.join(ROOT, name));
		const packages = must('npm', 'ls', '--omit=dev', '--all', '--parseable', '--prefix', ROOT).split('\n').filter(name => name.includes('/node_modules/'));
		for (const file of [process.execPath, tools[1], ...built, ...packages, ...new Set(libraries(process.execPath, tools[1], built[0]!, path.join(ROOT, 'build/test/streams')))]) {
			cpSync(file, path.join(image, file), {recursive: true, dereference: true});
		}

		must('cp', tools[0], path.join(image, 'bin/busybox'));
		must('ln', '-sf', tools[1], path.join(image, 'bin/ip'));
		must('ln', '-sf', process.execPath, path.join(image, 'bin/node'));
		writeFileSync(path.join(image, 'init'), INIT(`cd ${ROOT} && ${command}`));
		chmodSync(path.join(image, 'init'), 0o755);
		archive(image, this.#archive);
		rmSync(image, {recursive: true});
	}

	remove(): void {
		rmSync(this.directory, {recursive: true, force: true});
	}

	/**
	Boots, runs the command and waits for its end.

	@param hear - each line that it says.
	@returns its exit code.
	@throws with the end of the kernel's own log when the machine stops before that, or takes too long.
	*/
	async boot({image, modules, release}: Kernel, hear: (line: string) => void, timeoutMs: number, stop: AbortSignal): Promise<number> {
		const initramfs = path.join(this.directory, 'initramfs.cpio');
		const log = path.join(this.directory, 'console');
		must('sh', '-c', 'cat "$0" "$1" > "$2"', this.#archive, modules, initramfs);
		// Stock kernels do not run on every /dev/kvm, and multi-threaded TCG made some oops that patch their code.
		const qemu = spawn('qemu-system-x86_64', [
			'-machine', 'q35,usb=off,smbus=off,sata=off,vmport=off', '-accel', 'tcg,thread=single,tb-size=512', '-cpu', 'qemu64,+ssse3,+sse4.1,+sse4.2,+popcnt,+rdrand',
			'-smp', '2', '-m', String(MEMORY_MIB), '-nodefaults', '-no-user-config', '-display', 'none', '-no-reboot', '-monitor', 'none',
			'-serial', `file:${log}`, '-serial', 'stdio', '-kernel', image, '-initrd', initramfs,
			'-append', 'console=ttyS0 quiet loglevel=4 panic=-1 oops=panic mitigations=off nokaslr no_timer_check tsc=reliable random.trust_cpu=on',
		], {stdio: ['ignore', 'pipe', 'pipe'], signal: AbortSignal.any([stop, AbortSignal.timeout(timeoutMs)]), killSignal: 'SIGKILL'});
		const ended = new Promise<string>(resolve => {
			qemu.once('error', error => {
				resolve(error.name === 'AbortError' ? stop.aborted ? 'stopped' : `no end after ${timeoutMs / 1000} s` : error.message);
			});
			qemu.once('close', code => {
				resolve(`QEMU ended with ${code}`);
			});
		});
		let said = '';
		qemu.stderr.on('data', text => {
			said += text;
		});
		if (qemu.pid !== undefined) {
			setPriority(qemu.pid, constants.priority.PRIORITY_LOW);
		}

		let code: number | undefined;
		for await (const line of createInterface({input: qemu.stdout})) {
			const [, digits] = /^ended with (\d+)$/.exec(line) ?? [];
			if (digits === undefined) {
				hear(line);
			} else {
				code = Number(digits);
			}
		}

		const how = await ended;
		if (code === undefined) {
			const lines = existsSync(log) ? readFileSync(log, 'utf8').trimEnd().split('\n').slice(-30).join('\n') : '';
			throw new Error(`${release}: ${how}\n${said}${lines}`);
		}

		return code;
	}
}
