/**
`npm run demo`: two pods, a real HAProxy, and the agent; nothing of the host's own network is touched, and everything goes at the end, also on Ctrl-C.
*/
import {spawn, spawnSync, type ChildProcess} from 'node:child_process';
import {chmodSync, mkdirSync, mkdtempSync, readFileSync, rmSync, rmdirSync, writeFileSync} from 'node:fs';
import {tmpdir} from 'node:os';
import path from 'node:path';
import {setTimeout as sleep} from 'node:timers/promises';
import {fileURLToPath} from 'node:url';
import {findCgroup2} from '../src/loader/host.js';
import {native} from '../src/native.js';

const CLI = fileURLToPath(new URL('../src/cli/main.js', import.meta.url));
const PROXY_UID = '1337';
const NAME = `sidestep-demo-${process.pid}`;
const NODE = `${NAME}-node`;
const CLIENT = `${NAME}-client`;
const SERVER = `${NAME}-server`;

const directory = mkdtempSync(path.join(tmpdir(), `${NAME}-`));
const bpffs = path.join(directory, 'bpf');
const cgroup = path.join(findCgroup2() ?? '/sys/fs/cgroup', NAME);
const podsFile = path.join(directory, 'pods.yaml');
const undo: Array<() => void> = [];
const children: ChildProcess[] = [];
let stopping = false;

const say = (text: string) => {
	console.log(`\n\u001B[1m${text}\u001B[0m`);
};

function must(command: string, ...args: readonly string[]): string {
	const {status, stdout, stderr, error} = spawnSync(command, args, {encoding: 'utf8'});
	if (status !== 0) {
		throw new Error(`${command} ${args.join(' ')}: ${error?.message ?? stderr}`);
	}

	return stdout;
}

/** In a pod, and in the demo's cgroup, where the programs are attached. */
function inPod(netns: string, ...command: readonly string[]): [string, readonly string[]] {
	return ['sh', ['-c', `echo 0 > ${cgroup}/cgroup.procs && exec ip netns exec ${netns} "$@"`, 'sh', ...command]];
}

function start([command, args]: [string, readonly string[]], log?: (text: string) => void): ChildProcess {
	const child = spawn(command, args, {stdio: ['ignore', 'pipe', 'pipe'], cwd: '/'});
	child.stdout!.setEncoding('utf8').on('data', (text: string) => log?.(text));
	child.stderr!.setEncoding('utf8').on('data', (text: string) => log?.(text));
	children.push(child);
	return child;
}

async function until(what: string, test: () => boolean): Promise<void> {
	for (let tries = 0; !test(); tries++) {
		if (stopping || tries > 500) {
			throw new Error(stopping ? 'stopped' : `gave up waiting: ${what}`);
		}

		await sleep(20);
	}
}

function buildPods(): void {
	// HAProxy reads its configuration as another user.
	chmodSync(directory, 0o755);
	mkdirSync(bpffs);
	native.mountBpffs(bpffs);
	undo.push(() => {
		native.unmount(bpffs);
	});
	mkdirSync(cgroup);
	undo.push(() => {
		rmdirSync(cgroup);
	});
	for (const netns of [NODE, CLIENT, SERVER]) {
		must('ip', 'netns', 'add', netns);
		undo.push(() => {
			must('ip', 'netns', 'del', netns);
		});
		must('ip', '-n', netns, 'link', 'set', 'lo', 'up');
	}

	must('ip', '-n', NODE, 'link', 'add', 'br0', 'type', 'bridge');
	must('ip', '-n', NODE, 'link', 'set', 'br0', 'up');
	for (const [number, netns] of [[2, CLIENT], [3, SERVER]] as const) {
		must('ip', 'link', 'add', 'eth0', 'netns', netns, 'type', 'veth', 'peer', 'name', `veth${number}`, 'netns', NODE);
		must('ip', '-n', NODE, 'link', 'set', `veth${number}`, 'master', 'br0', 'up');
		must('ip', '-n', netns, 'addr', 'add', `10.0.0.${number}/24`, 'dev', 'eth0');
		must('ip', '-n', netns, 'addr', 'add', `fd00::${number}/64`, 'dev', 'eth0', 'nodad');
		must('ip', '-n', netns, 'link', 'set', 'eth0', 'up');
	}
}

async function startServer(): Promise<void> {
	let ready = false;
	start(inPod(SERVER, process.execPath, '-e', `
		require('http').createServer((request, response) => {
			response.end('hello, connection from ' + request.socket.remoteAddress.replace('::ffff:', '') + ' port ' + request.socket.remotePort + '\\n');
		}).listen(8080, '::', () => console.log('ready'));
	`), () => {
		ready = true;
	});
	await until('the server listens', () => ready);
}

let haproxyLog = '';
async function startHaproxy(): Promise<void> {
	const config = path.join(directory, 'haproxy.cfg');
	writeFileSync(config, `
global
	maxconn 256
	log stdout format raw local0
defaults
	mode tcp
	timeout connect 3s
	timeout client 30s
	timeout server 30s
	log global
	log-format "HAProxy: client %ci port %cp, original destination %[dst] port %[dst_port], %B bytes"
listen capture
	bind 0.0.0.0:15001
	server original 0.0.0.0
`);
	start(inPod(CLIENT, 'setpriv', '--reuid', PROXY_UID, '--regid', PROXY_UID, '--clear-groups', 'haproxy', '-db', '-f', config), text => {
		haproxyLog += text;
	});
	await until('HAProxy listens', () => must('ip', 'netns', 'exec', CLIENT, 'ss', '-Htln').includes(':15001 '));
}

let agentLog = '';
async function startAgent(): Promise<ChildProcess> {
	agentLog = '';
	const agent = start([process.execPath, [CLI, 'run', '--pods-file', podsFile, '--bpffs', bpffs, '--cgroup', cgroup, '--metrics-address', '127.0.0.1:0']], text => {
		agentLog += text;
	});
	await until('the agent is up', () => agentLog.includes('metrics at') || agent.exitCode !== null);
	if (agent.exitCode !== null) {
		throw new Error(agentLog);
	}

	return agent;
}

function sidestep(...args: readonly string[]): void {
	console.log(`$ sidestep ${args.join(' ')}`);
	process.stdout.write(must(process.execPath, CLI, ...args, '--bpffs', bpffs));
}

async function request(host: string): Promise<void> {
	const before = haproxyLog.length;
	const [command, args] = inPod(CLIENT, 'curl', '-sS', '--max-time', '5', `http://${host}:8080/`, '-w', 'the application sees as its peer: %{remote_ip} port %{remote_port}; itself: %{local_ip} port %{local_port}\n');
	console.log(`$ curl http://${host}:8080/`);
	process.stdout.write(must(command, ...args).replaceAll(/^/gm, '    ').trimEnd());
	await sleep(150);
	const logged = haproxyLog.slice(before).trim();
	console.log(`\n    ${logged || 'HAProxy: nothing'}`);
}

function refused(host: string): void {
	const [command, args] = inPod(CLIENT, 'curl', '-sS', '--max-time', '5', `http://${host}:8080/`);
	console.log(`$ curl http://${host}:8080/`);
	const {status, stderr} = spawnSync(command, args, {encoding: 'utf8'});
	if (status !== 7) {
		throw new Error(`expected to be refused: ${stderr}`);
	}

	console.log(`    ${stderr.trim()}`);
}

function cleanUp(): void {
	for (const child of children) {
		child.kill('SIGKILL');
	}

	// What the children started dies with the cgroup's processes.
	try {
		for (let tries = 0; tries < 100; tries++) {
			const pids = readFileSync(`${cgroup}/cgroup.procs`, 'utf8').split('\n').filter(Boolean);
			if (pids.length === 0) {
				break;
			}

			for (const pid of pids) {
				process.kill(Number(pid), 'SIGKILL');
			}

			Atomics.wait(new Int32Array(new SharedArrayBuffer(4)), 0, 0, 20);
		}
	} catch {}

	for (const step of undo.splice(0).reverse()) {
		try {
			step();
		} catch (error) {
			console.error(`clean-up: ${(error as Error).message}`);
		}
	}

	rmSync(directory, {recursive: true, force: true});
}

async function demo(): Promise<void> {
	say('1. Two pods: client 10.0.0.2 and fd00::2 (with a HAProxy on port 15001), server 10.0.0.3 and fd00::3. No iptables rule anywhere.');
	buildPods();
	await startServer();
	await startHaproxy();
	writeFileSync(podsFile, 'pods: []\n');

	say('2. The agent runs; the client is not enrolled yet: it talks to the server directly.');
	await startAgent();
	await request('10.0.0.3');

	say('3. The client is enrolled by adding it to the pods file:');
	const yaml = `pods:\n  - name: demo/client\n    netns: /run/netns/${CLIENT}\n    proxy: {port: 15001}\n    exempt: {uids: [${PROXY_UID}]}   # HAProxy itself\n`;
	console.log(yaml.trimEnd().replaceAll(/^/gm, '    '));
	writeFileSync(podsFile, yaml);
	await until('the pod is enrolled', () => agentLog.includes('enrol demo/client'));
	await request('10.0.0.3');
	console.log('IPv6 is captured too, and Debian\'s HAProxy reads only IPv4 original destinations, so it does not listen there: refused, never direct.');
	refused('[fd00::3]');

	say('4. The kernel tells what it did:');
	sidestep('pods', 'demo/client');
	sidestep('map', 'dump', 'prefixes');

	say('5. The agent is killed (SIGKILL). Capture goes on, the counters too, and the CLI still answers.');
	for (const child of children) {
		if (child.spawnargs.includes(CLI)) {
			child.kill('SIGKILL');
		}
	}

	await sleep(100);
	await request('10.0.0.3');
	sidestep('status');
	sidestep('pods');

	say('6. `sidestep unload` takes everything away: direct again.');
	sidestep('unload');
	await request('10.0.0.3');
}

for (const signal of ['SIGINT', 'SIGTERM', 'SIGHUP'] as const) {
	process.on(signal, () => {
		stopping = true;
		cleanUp();
		process.exit(130);
	});
}

const started = Date.now();
try {
	await demo();
	say(`Done in ${((Date.now() - started) / 1000).toFixed(0)} s; cleaning up.`);
} catch (error) {
	if (!stopping) {
		console.error((error as Error).message);
		process.exitCode = 1;
	}
} finally {
	cleanUp();
}
