import {spawnSync} from 'node:child_process';
import {readFileSync, unlinkSync, writeFileSync} from 'node:fs';
import type {ServerResponse} from 'node:http';
import {createServer, type Socket} from 'node:net';
import path from 'node:path';
import {setTimeout as sleep} from 'node:timers/promises';
import test from 'ava';
import {BUILT_PLUGIN} from '../../src/cni/command.js';
import {CNI_VERSIONS} from '../../src/cni/install.js';
import {CALL, PREVIOUS, directory, httpAgent, listen, netconf, plugin, type PluginResult} from './plugin.js';

const OK = (_request: unknown, _body: unknown, response: {end(): void}) => {
	response.end();
};

test('it is one static program', t => {
	// An ELF file without PT_INTERP needs no loader, so no library either.
	const elf = readFileSync(BUILT_PLUGIN);
	const [offset, size, count] = [Number(elf.readBigUInt64LE(32)), elf.readUInt16LE(54), elf.readUInt16LE(56)];
	const types = Array.from({length: count}, (_, index) => elf.readUInt32LE(offset + index * size));
	t.true(types.includes(1));
	t.false(types.includes(3));
	t.true(elf.length < 2_000_000, `${elf.length} bytes`);
});

test('VERSION says what it takes, which is what the installer puts it into', async t => {
	for (const input of ['{"cniVersion":"0.4.0"}', '', 'garbage']) {
		const {code, stdout} = await plugin(input, {CNI_COMMAND: 'VERSION', CNI_NETNS: undefined, CNI_ARGS: undefined, CNI_CONTAINERID: undefined, CNI_IFNAME: undefined});
		t.is(code, 0);
		t.deepEqual(JSON.parse(stdout), {cniVersion: input.includes('0.4.0') ? '0.4.0' : '1.1.0', supportedVersions: CNI_VERSIONS});
	}
});

test('ADD asks the agent, and prints prevResult byte by byte', async t => {
	const socket = path.join(directory(t), 'cni.sock');
	const calls: unknown[] = [];
	await httpAgent(t, socket, (request, body, response) => {
		calls.push([request.method, request.url, JSON.parse(body)]);
		response.end();
	});
	const {code, stdout, stderr} = await plugin(netconf(socket));
	t.is(stderr, '');
	t.is(code, 0);
	t.is(stdout, `${PREVIOUS}\n`);
	t.deepEqual(calls, [['POST', '/cmdadd', CALL]]);
});

test('prevResult is printed as it is wherever it stands, and whatever is around it', async t => {
	const socket = path.join(directory(t), 'cni.sock');
	await httpAgent(t, socket, OK);
	const previous = '{"a":1}';
	for (const input of [
		`{"prevResult":${previous},"cniVersion":"1.0.0","socket":"${socket}"}`,
		`{"n":12,"prevResult"\n:\t${previous} ,"cniVersion":"0.3.1","socket":"${socket}"}\n`,
		`{"cniVersion":"0.4.0","args":{"prevResult":{"b":2}},"list":[{"prevResult":{"c":3}}],"socket":"${socket}","prevResult": ${previous}}`,
		`{"cniVersion":"0.4.0","socket":"${socket}","prevResult":${previous},"args":{"prevResult":7}}`,
		`{"prevResult":{"old":0},"cniVersion":"1.1.0","socket":"${socket}","prevResult":${previous}}`,
	]) {
		const {stdout, stderr} = await plugin(input);
		t.is(stdout, `${previous}\n`, stderr);
	}
});

test('a prevResult of a million bytes, nearly', async t => {
	const socket = path.join(directory(t), 'cni.sock');
	await httpAgent(t, socket, OK);
	const previous = JSON.stringify({ips: [], dns: {search: Array.from({length: 24_000}, (_, index) => `zone-${index}.example.org.very.long.indeed`)}});
	t.true(previous.length > 900_000, `${previous.length}`);
	t.is((await plugin(netconf(socket, '', previous))).stdout, `${previous}\n`);
});

test('addresses of all versions\' results', async t => {
	const socket = path.join(directory(t), 'cni.sock');
	const ips: unknown[] = [];
	await httpAgent(t, socket, (_request, body, response) => {
		ips.push((JSON.parse(body) as typeof CALL).IPs);
		response.end();
	});
	for (const previous of ['{"ips":[{"version":"4","address":"10.0.0.1/8"}]}', '{"ips":[{"address":"fd00::1/128"}]}', '{"ips":[]}', '{"ips":null}', '{}']) {
		await plugin(netconf(socket, '', previous));
	}

	t.deepEqual(ips, [['10.0.0.1'], ['fd00::1'], [], [], []]);
	const {error} = await plugin(netconf(socket, '', '{"ips":[{"address":7}]}'));
	t.is(error?.code, 6);
});

test('CHECK asks the agent, and prints nothing; before 0.4.0 there is no CHECK', async t => {
	const socket = path.join(directory(t), 'cni.sock');
	const urls: unknown[] = [];
	await httpAgent(t, socket, (request, _body, response) => {
		urls.push(request.url);
		response.end();
	});
	const {code, stdout} = await plugin(netconf(socket), {CNI_COMMAND: 'CHECK'});
	t.deepEqual([code, stdout], [0, '']);
	t.deepEqual(urls, ['/cmdcheck']);
	const {error} = await plugin(netconf(socket).replace('1.0.0', '0.3.1'), {CNI_COMMAND: 'CHECK'});
	t.is(error?.code, 1);
});

test('STATUS and GC succeed without an agent', async t => {
	for (const command of ['STATUS', 'GC']) {
		const {code, stdout} = await plugin('{"cniVersion":"1.1.0","name":"pods"}', {CNI_COMMAND: command, CNI_CONTAINERID: undefined, CNI_NETNS: undefined, CNI_IFNAME: undefined});
		t.deepEqual([code, stdout], [0, '']);
	}
});

test('DEL tells the agent; namespace and prevResult may be gone', async t => {
	const socket = path.join(directory(t), 'cni.sock');
	const calls: unknown[] = [];
	await httpAgent(t, socket, (request, body, response) => {
		calls.push([request.url, JSON.parse(body)]);
		response.statusCode = calls.length === 1 ? 200 : 500;
		response.end();
	});
	t.is((await plugin(netconf(socket), {CNI_COMMAND: 'DEL'})).code, 0);
	const {code, stdout, stderr} = await plugin(netconf(socket, '', null), {CNI_COMMAND: 'DEL', CNI_NETNS: undefined});
	t.deepEqual([code, stdout], [0, '']);
	t.regex(stderr, /DEL goes on, although the agent says/);
	t.deepEqual(calls, [['/cmddel', CALL], ['/cmddel', {...CALL, Netns: '', IPs: []}]]);
});

test('DEL never fails and never waits for long', async t => {
	const base = directory(t);
	const silent = path.join(base, 'silent.sock');
	await listen(t, createServer(() => undefined), silent);
	const inputs: Array<[string, string]> = [
		[netconf(path.join(base, 'nobody.sock')), 'ENOENT'], [netconf(silent), 'did not answer in time'], ['', 'not JSON'], [netconf(silent, '"timeoutSeconds":0'), 'timeoutSeconds'], [netconf('relative'), 'socket'],
	];
	for (const [input, why] of inputs) {
		const {code, stdout, stderr, ms} = await plugin(input, {CNI_COMMAND: 'DEL'});
		t.deepEqual([code, stdout], [0, ''], input);
		t.true(stderr.includes(why), stderr);
		t.true(ms < 10_000);
	}
});

test('what is no pod passes, and the agent is not asked', async t => {
	const socket = path.join(directory(t), 'nobody.sock');
	for (const args of [undefined, '', 'IgnoreUnknown=1', 'K8S_POD_NAMESPACE=shop;X=K8S_POD_NAME=web']) {
		const {code, stdout} = await plugin(netconf(socket), {CNI_ARGS: args});
		t.deepEqual([code, stdout], [0, `${PREVIOUS}\n`]);
	}
});

const refused = test.macro({
	async exec(t, code: number, message: RegExp, input: string | Buffer, environment: Readonly<Record<string, string | undefined>> = {}) {
		const result = await plugin(input, environment);
		t.is(result.code, 1);
		t.is(result.error?.code, code, result.stdout);
		t.regex(`${result.error?.msg}: ${result.error?.details}`, message);
		t.regex(result.stderr, message, 'the log has it as well');
	},
	title: (title = '') => `refused: ${title}`,
});
const nowhere = '/nonexistent/cni.sock';

test('nothing on stdin', refused, 6, /not JSON/, '');
test('no JSON', refused, 6, /not JSON/, '{"cniVersion":"1.0.0"');
test('something behind the JSON', refused, 6, /not JSON/, `${netconf(nowhere)}}`);
test('bytes that are no UTF-8', refused, 6, /not JSON/, Buffer.from('7b2261223a22ff227d', 'hex'));
test('a list', refused, 6, /not an object/, '[]');
test('more than a million bytes', refused, 6, /larger than 1048576/, `${netconf(nowhere)}${' '.repeat(1_048_576)}`);
test('a hundred thousand brackets', refused, 6, /deeper than 64/, `{"cniVersion":"1.0.0","prevResult":${'['.repeat(100_000)}`);
test('no cniVersion', refused, 1, /says null/, '{"prevResult":{}}');
test('a cniVersion without chains', refused, 1, /says "0\.2\.0"/, netconf(nowhere).replace('1.0.0', '0.2.0'));
test('a cniVersion of the future', refused, 1, /says "2\.0\.0"/, netconf(nowhere).replace('1.0.0', '2.0.0'));
test('no prevResult', refused, 7, /without a prevResult.*after another plugin/, netconf(nowhere, '', null));
test('a prevResult that is no object', refused, 7, /without a prevResult/, netconf(nowhere, '', 'null'));
test('a prevResult that a later one takes back', refused, 7, /without a prevResult/, netconf(nowhere, '', '{},"prevResult":null'));
test('a relative socket', refused, 7, /socket.*absolute path.*"cni\.sock"/, netconf('cni.sock'));
test('a socket that is too long', refused, 7, /at most 107 bytes/, netconf(`/${'x'.repeat(107)}`));
test('a socket that is a number', refused, 7, /socket/, '{"cniVersion":"1.0.0","socket":1,"prevResult":{}}');
test('excluded namespaces that are text', refused, 7, /excludeNamespaces.*a list of names/, netconf(nowhere, '"excludeNamespaces":"kube-system"'));
test('excluded namespaces with a number', refused, 7, /excludeNamespaces/, netconf(nowhere, '"excludeNamespaces":["a",1]'));

test('pods of excluded namespaces start without an agent, others do not', async t => {
	const conf = netconf(nowhere, '"timeoutSeconds":1,"excludeNamespaces":["kube-system","shop"]');
	const {code, stdout} = await plugin(conf);
	t.deepEqual([code, stdout], [0, `${PREVIOUS}\n`]);
	t.not((await plugin(conf, {CNI_ARGS: 'K8S_POD_NAMESPACE=shop-2;K8S_POD_NAME=web-0'})).code, 0);
});

test('a time-out of 0', refused, 7, /timeoutSeconds.*1 to 600, got 0/, netconf(nowhere, '"timeoutSeconds":0'));
test('a time-out of 1.5', refused, 7, /got 1\.5/, netconf(nowhere, '"timeoutSeconds":1.5'));
test('a time-out beyond all integers', refused, 7, /timeoutSeconds/, netconf(nowhere, '"timeoutSeconds":18446744073709551615'));
test('a time-out that is text', refused, 7, /got "60"/, netconf(nowhere, '"timeoutSeconds":"60"'));
test('no command', refused, 4, /CNI_COMMAND is not set/, netconf(nowhere), {CNI_COMMAND: undefined});
test('an unknown command', refused, 4, /got add/, netconf(nowhere), {CNI_COMMAND: 'add'});
test('no container id', refused, 4, /CNI_CONTAINERID is not set/, netconf(nowhere), {CNI_CONTAINERID: ''});
test('no namespace', refused, 4, /CNI_NETNS is not set/, netconf(nowhere), {CNI_NETNS: undefined});
test('no interface', refused, 4, /CNI_IFNAME is not set/, netconf(nowhere), {CNI_IFNAME: undefined});
test('arguments that are none', refused, 4, /got K8S_POD_NAME/, netconf(nowhere), {CNI_ARGS: 'K8S_POD_NAMESPACE=a;K8S_POD_NAME'});
test('a socket in a file', refused, 5, /ENOTDIR/, netconf('/etc/passwd/cni.sock'));

test('an agent that refuses: the pod fails at once, with the agent\'s reason', async t => {
	const socket = path.join(directory(t), 'cni.sock');
	let calls = 0;
	await httpAgent(t, socket, (_request, _body, response) => {
		calls++;
		response.statusCode = 500;
		response.end('pod shop/web-0: its annotation is "wrong" \u{1F9ED}');
	});
	const {code, error} = await plugin(netconf(socket));
	t.is(code, 1);
	t.deepEqual(error, {cniVersion: '1.0.0', code: 100, msg: 'the sidestep agent refused: pod shop/web-0: its annotation is "wrong" \u{1F9ED}', details: `HTTP status 500 at ${socket}`});
	t.is(calls, 1);
});

test('an agent that is down for as long as the plugin waits: the pod fails, and says what to do', async t => {
	const base = directory(t);
	const stale = path.join(base, 'stale.sock');
	// Bound by a process that died: nobody listens.
	const {status, stderr} = spawnSync(process.execPath, ['-e', `require('net').createServer().listen(${JSON.stringify(stale)}, () => process.kill(process.pid, 'SIGKILL'))`], {encoding: 'utf8'});
	t.is(status, null, stderr);
	for (const [socket, why] of [[path.join(base, 'nobody.sock'), 'ENOENT'], [stale, 'ECONNREFUSED']] as const) {
		const {code, error, stderr: log, ms} = await plugin(netconf(socket, '"timeoutSeconds":1'));
		t.is(code, 1);
		t.is(error?.code, 11);
		t.regex(error!.msg, new RegExp(`did not let the pod start in 1 s \\(connect: ${why}: .*would start uncaptured`));
		t.regex(error!.details, /whether the agent's pod on this node is ready/);
		t.true(ms >= 1000 && ms < 15_000, `${ms}`);
		t.is(log.split('\n').filter(line => line.includes('waiting')).length, 1, 'one line, not one a try');
	}
});

for (const [what, then, why] of [
	['is held by the next call', (response: ServerResponse) => response.on('error', () => undefined), 'it took the call and did not answer in time'],
	['goes away', (response: ServerResponse) => response.destroy(), 'it closed the connection without an answer'],
] as const) {
	test(`an agent that says why not yet, and then ${what}: its last reason is the pod's`, async t => {
		const socket = path.join(directory(t), 'cni.sock');
		const reasons = ['the agent is starting', 'no ztunnel is connected'];
		await httpAgent(t, socket, (_request, _body, response) => {
			const reason = reasons.shift();
			if (reason === undefined) {
				then(response);
				return;
			}

			response.statusCode = 503;
			response.end(reason);
		});
		const {error} = await plugin(netconf(socket, '"timeoutSeconds":5'));
		t.is(error?.code, 11);
		t.is(error!.msg, `the sidestep agent did not let the pod start in 5 s (it says: no ztunnel is connected; then: ${why}): without it the pod would start uncaptured`);
	});
}

test('an agent that says why not yet until the end: its reason is the pod\'s', async t => {
	const socket = path.join(directory(t), 'cni.sock');
	await httpAgent(t, socket, (_request, _body, response) => {
		response.statusCode = 503;
		response.end('no ztunnel is connected');
	});
	const {error} = await plugin(netconf(socket, '"timeoutSeconds":2'));
	t.regex(error!.msg, /in 2 s \(it says: no ztunnel is connected[;)]/);
});

test('an agent that takes the call and says nothing', async t => {
	const socket = path.join(directory(t), 'cni.sock');
	await listen(t, createServer(() => undefined), socket);
	const {error} = await plugin(netconf(socket, '"timeoutSeconds":1'));
	t.is(error?.code, 11);
	t.regex(error!.msg, /took the call and did not answer in time/);
});

/** One that is called before the agent is there. `waiting` resolves when it has said that it waits. */
function waitingPlugin(socket: string): {readonly running: Promise<PluginResult>; readonly waiting: Promise<void>} {
	let running: Promise<PluginResult>;
	const waiting = new Promise<void>((resolve, reject) => {
		running = plugin(netconf(socket, '"timeoutSeconds":60'), {}, stderr => {
			if (stderr.includes('waiting for the agent')) {
				resolve();
			}
		});
		running.then(({stdout}) => {
			reject(new Error(`it did not wait: ${stdout}`));
		}, reject);
	});
	return {running: running!, waiting};
}

test('an agent that comes late', async t => {
	const socket = path.join(directory(t), 'cni.sock');
	const {running, waiting} = waitingPlugin(socket);
	await waiting;
	await sleep(500);
	await httpAgent(t, socket, OK);
	const {code, stdout, ms} = await running;
	t.is(code, 0);
	t.is(stdout, `${PREVIOUS}\n`);
	t.true(ms < 30_000);
});

test('an agent that stops in the middle, in each way there is, and the next one', async t => {
	const socket = path.join(directory(t), 'cni.sock');
	const ways: Array<(connection: Socket) => void> = [
		connection => connection.destroy(),
		connection => connection.once('data', () => connection.destroy()),
		connection => connection.once('data', () => connection.end('HTTP/1.1 2')),
		connection => connection.once('data', () => connection.end('HTTP/1.1 200 OK\r\nContent-Length: 0\r\n')),
		connection => connection.once('data', () => connection.end('HTTP/1.1 503 Service Unavailable\r\n\r\nstopping')),
	];
	const total = ways.length;
	const server = createServer(connection => {
		connection.on('error', () => undefined);
		const way = ways.shift();
		if (way) {
			way(connection);
			return;
		}

		// The next agent, after a moment without any.
		server.close();
		setTimeout(() => {
			void httpAgent(t, socket, OK);
		}, 300);
		connection.destroy();
	});
	await listen(t, server, socket);
	const {code, stdout, stderr} = await plugin(netconf(socket, '"timeoutSeconds":60'));
	t.is(code, 0, stderr);
	t.is(stdout, `${PREVIOUS}\n`);
	t.is(total, 5);
	t.is(ways.length, 0);
	t.regex(stderr, /it says: stopping/);
});

test('an agent that is not ready yet is asked again until it is', async t => {
	const socket = path.join(directory(t), 'cni.sock');
	let calls = 0;
	await httpAgent(t, socket, (_request, _body, response) => {
		response.statusCode = ++calls < 4 ? 503 : 200;
		response.end('the pod is not known yet');
	});
	const {code, stderr} = await plugin(netconf(socket));
	t.is(code, 0);
	t.is(calls, 4);
	t.is(stderr, `sidestep-cni: waiting for the agent at ${socket} (it says: the pod is not known yet)\n`);
});

for (const [what, answer] of [
	['garbage', 'SSH-2.0-OpenSSH_9.2\r\n'], ['a status that is none', 'HTTP/1.1 x00 OK\r\n\r\n'], ['endless garbage', 'x'.repeat(1_000_000)], ['another version of HTTP', 'HTTP/2 200\r\n\r\n'],
] as const) {
	test(`somebody else at the socket says ${what}: the pod fails at once`, async t => {
		const socket = path.join(directory(t), 'cni.sock');
		await listen(t, createServer(connection => {
			connection.on('error', () => undefined);
			connection.once('data', () => connection.end(answer));
		}), socket);
		const {error, ms} = await plugin(netconf(socket, '"timeoutSeconds":60'));
		t.is(error?.code, 5);
		t.regex(error!.msg, /is not the sidestep agent/);
		t.true(ms < 30_000);
	});
}

test('a file in the place of the socket counts as an agent that is away', async t => {
	const socket = path.join(directory(t), 'cni.sock');
	writeFileSync(socket, '');
	const {running, waiting} = waitingPlugin(socket);
	await waiting;
	unlinkSync(socket);
	await httpAgent(t, socket, OK);
	t.is((await running).code, 0);
});

test('an answer that is larger than anything we say is cut', async t => {
	const socket = path.join(directory(t), 'cni.sock');
	await httpAgent(t, socket, (_request, _body, response) => {
		response.statusCode = 400;
		response.end('n'.repeat(10_000_000));
	});
	const {error} = await plugin(netconf(socket));
	t.is(error?.code, 100);
	t.true(error!.msg.length < 3000);
});

test('an answer without an end is not read to its end', async t => {
	const socket = path.join(directory(t), 'cni.sock');
	let said = 0;
	await listen(t, createServer(connection => {
		connection.on('error', () => undefined);
		connection.write('HTTP/1.1 500 No\r\n\r\n');
		const more = () => {
			while (said < 100_000_000 && !connection.destroyed) {
				said += 65_536;
				if (!connection.write(Buffer.alloc(65_536, 'n'))) {
					return;
				}
			}

			connection.end();
		};

		connection.on('drain', more);
		more();
	}), socket);
	const {error} = await plugin(netconf(socket));
	t.is(error?.code, 100);
	t.true(said < 50_000_000, `${said} bytes`);
});
