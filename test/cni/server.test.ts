import {createHook} from 'node:async_hooks';
import {once} from 'node:events';
import {existsSync, lstatSync, mkdirSync, readdirSync, renameSync, rmSync, unlinkSync, writeFileSync} from 'node:fs';
import {request as httpRequest} from 'node:http';
import {connect, createServer} from 'node:net';
import path from 'node:path';
import {spawnSync} from 'node:child_process';
import {setTimeout as sleep} from 'node:timers/promises';
import test, {type ExecutionContext} from 'ava';
import {CniRetry, CniServer, parseCniCall, type CniCall, type CniHandler} from '../../src/cni/server.js';
import {HostError, InputError} from '../../src/errors.js';
import {Running, eventually} from '../helpers/process.js';
import {CALL, PREVIOUS, directory, netconf, plugin} from './plugin.js';

const UNDERSTOOD: CniCall = {netns: CALL.Netns, podName: CALL.PodName, podNamespace: CALL.PodNamespace, podUid: CALL.PodUid, containerId: CALL.ContainerId, ips: CALL.IPs};
const YES: CniHandler = {add: async () => undefined, check: async () => undefined, del: async () => undefined};

async function serve(t: ExecutionContext, handler: Partial<CniHandler> = {}, checkMs?: number) {
	const socketPath = path.join(directory(t), 'run', 'cni.sock');
	const lines: string[] = [];
	const server = new CniServer({socketPath, handler: {...YES, ...handler}, log: line => lines.push(line), ...(checkMs === undefined ? {} : {checkMs})});
	await server.listen();
	t.teardown(async () => server.close());
	return {server, socketPath, lines};
}

async function post(socketPath: string, url: string, body: string, method = 'POST', headers = {}): Promise<[status: number, text: string]> {
	return new Promise((resolve, reject) => {
		const request = httpRequest({socketPath, path: url, method, headers}, response => {
			let text = '';
			response.setEncoding('utf8').on('data', (chunk: string) => {
				text += chunk;
			}).once('end', () => {
				resolve([response.statusCode!, text]);
			});
		});
		request.once('error', reject);
		request.end(body);
	});
}

test('each command reaches its handler with what the runtime said, and is counted', async t => {
	const calls: unknown[] = [];
	const {server, socketPath, lines} = await serve(t, {
		async add(call) {
			calls.push(['add', call]);
		},
		async check(call) {
			calls.push(['check', call]);
		},
		async del(call) {
			calls.push(['del', call]);
		},
	});
	for (const command of ['ADD', 'CHECK', 'DEL']) {
		t.is((await plugin(netconf(socketPath), {CNI_COMMAND: command})).code, 0);
	}

	t.deepEqual(calls, [['add', UNDERSTOOD], ['check', UNDERSTOOD], ['del', UNDERSTOOD]]);
	const one = {ok: 1, failed: 0, retry: 0, gone: 0};
	t.deepEqual(server.counters, {add: one, check: one, del: one});
	t.deepEqual([server.refused, server.inFlight, lines.length], [0, 0, 0]);
});

test('the pod is held until the handler is done', async t => {
	let release: () => void = () => undefined;
	const {server, socketPath} = await serve(t, {
		async add() {
			await new Promise<void>(resolve => {
				release = resolve;
			});
		},
	});
	let isDone = false;
	const running = plugin(netconf(socketPath, '"timeoutSeconds":60')).finally(() => {
		isDone = true;
	});
	await eventually('in flight', () => server.inFlight === 1);
	await sleep(300);
	t.false(isDone);
	release();
	t.is((await running).stdout, `${PREVIOUS}\n`);
	t.is(server.inFlight, 0);
});

test('a retry is asked again, any other error is the pod\'s', async t => {
	let calls = 0;
	const {server, socketPath, lines} = await serve(t, {
		async add() {
			if (++calls < 3) {
				throw new CniRetry('the pod is not known yet');
			}

			throw new Error('ztunnel says no\nat somewhere');
		},
	});
	const {code, error, stderr} = await plugin(netconf(socketPath, '"timeoutSeconds":60'));
	t.is(code, 1);
	t.is(error?.msg, 'the sidestep agent refused: ztunnel says no');
	t.regex(stderr, /the pod is not known yet/);
	t.deepEqual(server.counters.add, {ok: 0, failed: 1, retry: 2, gone: 0});
	t.deepEqual(lines, ['CNI ADD of shop/web-0 failed: ztunnel says no']);
});

test('a plugin that is gone aborts its call', async t => {
	let aborted = false;
	const {server, socketPath} = await serve(t, {
		async add(_call, signal) {
			await once(signal, 'abort');
			aborted = true;
			throw new Error('too late');
		},
	});
	const {error} = await plugin(netconf(socketPath, '"timeoutSeconds":1'));
	t.is(error?.code, 11);
	await eventually('aborted', () => aborted);
	t.deepEqual(server.counters.add, {ok: 0, failed: 0, retry: 0, gone: 1});
	t.is(server.inFlight, 0);
});

test('a stopping agent sends its plugins to the next one; none fails', async t => {
	const pods = 20;
	const {server, socketPath} = await serve(t, {
		async add(_call, signal) {
			await once(signal, 'abort');
		},
	});
	const running = Array.from({length: pods}, async () => plugin(netconf(socketPath, '"timeoutSeconds":90')));
	await eventually('all are held', () => server.inFlight === pods);
	await server.close();
	t.false(existsSync(socketPath));
	t.deepEqual(server.counters.add, {ok: 0, failed: 0, retry: pods, gone: 0});
	const next = new CniServer({socketPath, handler: YES, log: () => undefined});
	await next.listen();
	t.teardown(async () => next.close());
	for (const {code, stderr} of await Promise.all(running)) {
		t.is(code, 0, stderr);
	}

	t.is(next.counters.add.ok, pods);
});

test('close waits for no client that does not read, and may be repeated', async t => {
	const {server, socketPath} = await serve(t, {
		async add(_call, signal) {
			await once(signal, 'abort');
		},
	});
	const client = connect(socketPath);
	client.pause();
	client.write(`POST /cmdadd HTTP/1.1\r\nHost: x\r\nContent-Length: ${JSON.stringify(CALL).length}\r\n\r\n${JSON.stringify(CALL)}`);
	t.teardown(() => {
		client.destroy();
	});
	const half = connect(socketPath);
	half.on('error', () => undefined);
	half.write('POST /cmdadd HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n\r\n');
	await eventually('in flight', () => server.inFlight === 1);
	const started = performance.now();
	await server.close();
	await server.close();
	t.true(performance.now() - started < 15_000);
});

test('root only, also the directory', async t => {
	const {socketPath} = await serve(t);
	t.is(lstatSync(socketPath).mode & 0o777, 0o600);
	t.is(lstatSync(path.dirname(socketPath)).mode & 0o777, 0o700);
});

/** As a process leaves it that dies while it listens. */
function leaveSocket(socketPath: string): void {
	spawnSync(process.execPath, ['-e', `require('net').createServer().listen(${JSON.stringify(socketPath)}, () => process.kill(process.pid, 'SIGKILL'))`]);
}

async function isDead(socketPath: string): Promise<boolean> {
	const client = connect(socketPath);
	try {
		await once(client, 'connect');
		return false;
	} catch {
		return true;
	} finally {
		client.destroy();
	}
}

test('a dead agent\'s socket is replaced, a living one\'s is not, and nothing else is', async t => {
	const base = directory(t);
	const socketPath = path.join(base, 'cni.sock');
	leaveSocket(socketPath);
	t.true(lstatSync(socketPath).isSocket());
	const server = new CniServer({socketPath, handler: YES, log: () => undefined});
	await server.listen();
	t.teardown(async () => server.close());
	t.is((await plugin(netconf(socketPath))).code, 0);
	const second = new CniServer({socketPath, handler: YES, log: () => undefined});
	await t.throwsAsync(second.listen(), {instanceOf: HostError, message: /another process listens.*stop that agent first/});
	t.is((await plugin(netconf(socketPath))).code, 0, 'the first is still there');

	const file = path.join(base, 'file');
	writeFileSync(file, 'mine');
	await t.throwsAsync(new CniServer({socketPath: file, handler: YES, log: () => undefined}).listen(), {instanceOf: HostError, message: /no socket/});
	t.is(lstatSync(file).size, 4);
	mkdirSync(path.join(base, 'directory'));
	await t.throwsAsync(new CniServer({socketPath: path.join(base, 'directory'), handler: YES, log: () => undefined}).listen(), {instanceOf: HostError});
	await t.throwsAsync(new CniServer({socketPath: path.join(file, 'cni.sock'), handler: YES, log: () => undefined}).listen(), {instanceOf: HostError, message: /cannot be listened on/});
	for (const path of ['relative', `/${'x'.repeat(103)}`]) {
		await t.throwsAsync(new CniServer({socketPath: path, handler: YES, log: () => undefined}).listen(), {instanceOf: InputError});
	}
});

test('a socket that somebody removes is made again; what somebody puts there instead is left alone', async t => {
	const {server, socketPath, lines} = await serve(t, {}, 50);
	unlinkSync(socketPath);
	await eventually('made again', () => existsSync(socketPath));
	t.is((await plugin(netconf(socketPath))).code, 0);
	t.regex(lines.join('\n'), /was gone: made again/);
	t.is(server.problem, undefined);

	unlinkSync(socketPath);
	const stranger = createServer();
	stranger.listen(socketPath);
	await once(stranger, 'listening');
	await eventually('a problem', () => server.problem !== undefined);
	t.regex(server.problem!, /another process listens/);
	t.true(existsSync(socketPath));
	stranger.close();
	await eventually('ours again', () => server.problem === undefined);
	t.is((await plugin(netconf(socketPath))).code, 0);
});

test('another process\' socket in place of ours is there after close, too', async t => {
	const {server, socketPath} = await serve(t, {}, 50);
	unlinkSync(socketPath);
	const stranger = createServer();
	stranger.listen(socketPath);
	await once(stranger, 'listening');
	t.teardown(() => {
		stranger.close();
	});
	await eventually('a problem', () => server.problem !== undefined);
	await server.close();
	t.false(await isDead(socketPath));
});

test('a path that cannot be looked at is a problem, until it can', async t => {
	const {server, socketPath, lines} = await serve(t, {}, 50);
	const run = path.dirname(socketPath);
	renameSync(run, `${run}-aside`);
	writeFileSync(run, '');
	await eventually('a problem', () => server.problem !== undefined);
	t.regex(server.problem!, /ENOTDIR/);
	unlinkSync(run);
	renameSync(`${run}-aside`, run);
	await eventually('no problem', () => server.problem === undefined);
	t.is((await plugin(netconf(socketPath))).code, 0);
	t.regex(lines.join('\n'), /ENOTDIR.*\n.*can be reached again$/);
	rmSync(run, {recursive: true});
	await eventually('made again, with its directory', () => existsSync(socketPath));
	t.is((await plugin(netconf(socketPath))).code, 0);
});

test('calls that are held when the file is made again are answered, and close sends all to the next agent', async t => {
	const held: Array<() => void> = [];
	const {server, socketPath} = await serve(t, {
		async add(_call, signal) {
			await Promise.race([once(signal, 'abort'), new Promise<void>(resolve => {
				held.push(resolve);
			})]);
		},
	}, 50);
	const running = [];
	for (const count of [1, 2, 3]) {
		running.push(plugin(netconf(socketPath, '"timeoutSeconds":90')));
		await eventually('held', () => server.inFlight === count);
		unlinkSync(socketPath);
		await eventually('made again', () => existsSync(socketPath));
	}

	held[0]!();
	t.is((await running[0]!).code, 0);
	t.is(server.inFlight, 2);
	await server.close();
	const next = new CniServer({socketPath, handler: YES, log: () => undefined});
	await next.listen();
	t.teardown(async () => next.close());
	t.deepEqual((await Promise.all(running)).map(({code}) => code), [0, 0, 0]);
	t.is(next.counters.add.ok, 2);
});

test.serial('close while the file is being made again: it is not made any more', async t => {
	const {server, socketPath, lines} = await serve(t, {}, 1);
	const dead = `${socketPath}-dead`;
	leaveSocket(dead);
	await new Promise<void>(resolve => {
		const hook = createHook({
			init(_id, type) {
				// The server asks whether anybody listens there.
				if (type === 'PIPECONNECTWRAP') {
					hook.disable();
					queueMicrotask(() => {
						resolve(server.close());
					});
				}
			},
		}).enable();
		renameSync(dead, socketPath);
	});
	t.deepEqual(lines, []);
	await sleep(300);
	t.deepEqual([readdirSync(path.dirname(socketPath)), lines, server.problem], [['cni.sock'], [], undefined]);
	t.true(await isDead(socketPath));
});

test('a process whose socket was replaced by a dead one\'s ends when it has closed its server', async t => {
	const socketPath = path.join(directory(t), 'cni.sock');
	const child = Running.start(process.execPath, ['--input-type=module', '-e', `
		import {CniServer} from ${JSON.stringify(new URL('../../src/cni/server.js', import.meta.url).href)};
		const never = async () => new Promise(() => {});
		const server = new CniServer({socketPath: ${JSON.stringify(socketPath)}, handler: {add: never, check: never, del: never}, log: console.log, checkMs: 50});
		await server.listen();
		console.log('listens');
		process.once('SIGTERM', async () => {
			await server.close();
			console.log('closed');
		});`]);
	t.teardown(async () => {
		await child.stop('SIGKILL');
	});
	await child.until('it listens', () => child.stdout.includes('listens'));
	// In the middle of a request.
	const client = connect(socketPath);
	t.teardown(() => {
		client.destroy();
	});
	client.on('error', () => undefined);
	client.write('POST /cmdadd HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n\r\n');
	await once(client, 'ready');
	unlinkSync(socketPath);
	leaveSocket(socketPath);
	await child.until('it has made it again', () => child.stdout.includes('made again'));
	child.child.kill('SIGTERM');
	await child.until('it has closed', () => child.stdout.includes('closed'));
	await eventually('it has ended', () => child.hasEnded, 10_000);
	t.false(existsSync(socketPath));
});

test('what is no call is refused, and the handler does not see it', async t => {
	let calls = 0;
	const {server, socketPath} = await serve(t, {
		async add() {
			calls++;
		},
	});
	const good = JSON.stringify(CALL);
	t.deepEqual(await post(socketPath, '/cmdadd', good), [200, '']);
	const bad: Array<[status: number, text: RegExp, url: string, body: string, method?: string]> = [
		[400, /expected POST to/, '/', good], [400, /expected POST/, '/cmdgc', good], [400, /expected POST/, '/cmdadd', '', 'GET'], [400, /expected JSON/, '/cmdadd', ''], [400, /expected JSON/, '/cmdadd', '{'],
		[400, /more than 65536/, '/cmdadd', ' '.repeat(65_537)],
	];
	for (const [status, text, url, body, method] of bad) {
		const [actualStatus, actualText] = await post(socketPath, url, body, method);
		t.is(actualStatus, status);
		t.regex(actualText, text);
	}

	// The connection ends, before or after an answer.
	const [status] = await post(socketPath, '/cmdadd', ' '.repeat(10_000_000), 'POST', {'transfer-encoding': 'chunked'}).catch(() => [400]);
	t.is(status, 400);
	const {error} = await plugin(netconf(socketPath, '', JSON.stringify({ips: Array.from({length: 20_000}, () => ({address: 'fd00:1234:5678:9abc::1/64'}))})));
	t.is(error?.msg, 'the sidestep agent refused: body: more than 65536 bytes');
	const raw = connect(socketPath);
	raw.end('garbage\r\n\r\n');
	const [chunk] = await once(raw, 'data') as [Buffer];
	t.regex(chunk.toString(), /^HTTP\/1\.1 400/);
	t.is(calls, 1);
	t.is(server.refused, bad.length + 2);
	t.deepEqual(await post(socketPath, '/cmdadd', good), [200, '']);
});

const wrong = test.macro({
	exec(t, command: 'add' | 'del', fields: object | string, message: RegExp) {
		t.throws(() => parseCniCall(typeof fields === 'string' ? fields : JSON.stringify({...CALL, ...fields}), command), {instanceOf: InputError, message});
	},
	title: (title = '') => `a call with ${title} is refused`,
});
test('a list in place of an object', wrong, 'add', '[]', /expected an object/);
test('null in place of an object', wrong, 'add', 'null', /expected an object/);
test('no namespace file', wrong, 'add', {Netns: undefined}, /Netns: expected text of at most 4096 characters, got nothing/);
test('an empty namespace file', wrong, 'add', {Netns: ''}, /Netns/);
test('a relative namespace file', wrong, 'del', {Netns: 'run/netns/x'}, /Netns: expected an absolute path, got "run/);
test('a zero byte in a path', wrong, 'add', {Netns: '/proc/1/ns/net\0/x'}, /Netns/);
test('a name that is a number', wrong, 'add', {PodName: 7}, /PodName: .* got 7/);
test('an empty name', wrong, 'del', {PodName: ''}, /PodName/);
test('a name of 5,000 letters', wrong, 'add', {PodName: 'x'.repeat(5000)}, /PodName/);
test('no uid', wrong, 'add', {PodUid: undefined}, /PodUid/);
test('no container id', wrong, 'add', {ContainerId: ''}, /ContainerId/);
test('no addresses', wrong, 'add', {IPs: undefined}, /IPs: expected a list.*got nothing/);
test('an address that is text', wrong, 'add', {IPs: '10.0.0.1'}, /IPs/);
test('an address that is none', wrong, 'add', {IPs: ['10.0.0.256']}, /got \["10\.0\.0\.256"]/);
test('an address with a prefix length', wrong, 'add', {IPs: ['10.0.0.1/8']}, /IPs/);
test('65 addresses', wrong, 'add', {IPs: Array.from({length: 65}, (_, index) => `10.0.0.${index}`)}, /at most 64/);

test('a call with keys that a newer plugin might add, and with what may be empty', t => {
	t.deepEqual(parseCniCall(JSON.stringify({...CALL, PodNamespace: '', PodUid: '', IPs: [], Interface: 'eth0'}), 'add'), {...UNDERSTOOD, podNamespace: '', podUid: '', ips: []});
	t.is(parseCniCall(JSON.stringify({...CALL, Netns: ''}), 'del').netns, '');
});
