/** Real programs through real proxies: whoever uses them has the same of them, accelerated, as without a proxy. */
import {createHash, randomBytes} from 'node:crypto';
import {chownSync, existsSync, mkdirSync, readFileSync, readdirSync, writeFileSync} from 'node:fs';
import path from 'node:path';
import {fileURLToPath} from 'node:url';
import test, {type ExecutionContext} from 'ava';
import {podEntry} from '../helpers/capture.js';
import {eventually, type Running} from '../helpers/process.js';
import {listening, startEnvoy, startHaproxy} from '../helpers/proxies.js';
import {World, type As, type Pod} from '../helpers/world.js';

const WITHIN_MS = 15_000;
const LARGE_BYTES = 64 << 20;

interface PodRow {
	readonly name: string;
	readonly reasons: Readonly<Record<string, number>>;
	readonly acceleration: Readonly<Record<'sentByClient' | 'sentByServer', {readonly redirected: {readonly messages: number}}>>;
}

const PROXIES = {haproxy: startHaproxy, envoy: startEnvoy} as const;

interface User {
	readonly pod: Pod;
	readonly host: string;
	/** The host in a URL. */
	readonly authority: string;
	/** Its own. */
	readonly directory: string;
}

interface Program {
	/** In a pod that all its users talk to. */
	readonly serve: (far: Pod, directory: string) => Promise<void>;
	/** @returns what the user has of it in the end. */
	readonly use: (user: User) => Promise<unknown>;
	/** So many messages at least go past TCP, on each hop that is looked at. */
	readonly redirected: number;
	/** Of those who come through Envoy; HAProxy's have IPv4. */
	readonly family: 4 | 6;
}

function write(directory: string, name: string, content: string | Uint8Array): string {
	const file = path.join(directory, name);
	writeFileSync(file, content);
	return file;
}

function makeDirectory(...parts: readonly string[]): string {
	const directory = path.join(...parts);
	mkdirSync(directory, {recursive: true});
	return directory;
}

const sha256 = (file: string) => createHash('sha256').update(readFileSync(file)).digest('hex');
const sha256OfEach = (directory: string) => readdirSync(directory).sort().map(name => `${name} ${sha256(path.join(directory, name))}`);

/** Runs to its end, which has to be a good one and come soon. */
async function done(pod: Pod, ...command: readonly string[]): Promise<string> {
	const running = pod.start(command);
	try {
		await running.until('its end', () => running.hasEnded, WITHIN_MS);
	} catch (error) {
		// Of redirected bytes only sidestep can tell.
		throw new Error(`${(error as Error).message}\n${pod.must('ss', '-tinmoe')}\n${pod.world.sidestep('sockets').stdout}`);
	}

	if (await running.ended !== 0) {
		throw new Error(`${running.title} ended with ${running.child.exitCode ?? running.child.signalCode}\n${running.stderr}\n${running.stdout}`);
	}

	return running.stdout;
}

async function started(pod: Pod, port: number, command: readonly string[], as?: As): Promise<Running> {
	const running = pod.start(command, as);
	await listening(pod, port, running);
	return running;
}

function nginxConfig(directory: string, http: string): string {
	const temporary = ['client_body', 'proxy', 'fastcgi', 'uwsgi', 'scgi'].map(name => `${name}_temp_path ${directory}/${name};`).join(' ');
	return write(directory, 'nginx.conf', `
daemon off; master_process off; pid ${directory}/nginx.pid; error_log stderr;
events {}
http { access_log off; keepalive_requests 100000; client_max_body_size 0; ${temporary} ${http} }
`);
}

const REQUESTS = 300;
const FRONT_PORT = 8000;

/** Sizes around those of nginx's buffers below and of what is redirected at all. */
const uploadBytes = (index: number) => index * 397 % 40_000;

/**
One connection for small and large, up and down. Wherever nginx has filled a buffer (a request longer than 1 KiB, bodies longer than 4) it asks FIONREAD
what is left, and does not read again if that is nothing.
*/
const nginx: Program = {
	redirected: 1000,
	family: 4,
	async serve(far, directory) {
		const files = makeDirectory(directory, 'files');
		makeDirectory(directory, 'up');
		const uploads = makeDirectory(directory, 'to-upload');
		for (let index = 1; index <= REQUESTS; index++) {
			write(files, String(index), randomBytes(uploadBytes(index)));
			write(uploads, String(index), randomBytes(uploadBytes(REQUESTS - index)));
		}

		write(uploads, 'large', randomBytes(LARGE_BYTES));
		write(files, 'large', randomBytes(LARGE_BYTES));
		await started(far, 8080, ['nginx', '-c', nginxConfig(directory, `
client_body_buffer_size 4k;
server {
	listen 8080; listen [::]:8080; root ${directory};
	location /up/ { dav_methods PUT; create_full_put_path on; }
}`)]);
	},
	async use({pod, authority, directory}) {
		const server = path.dirname(directory);
		const received = makeDirectory(directory, 'received');
		const header = write(directory, 'header', `X-Long: ${'x'.repeat(3000)}`);
		await started(pod, FRONT_PORT, ['nginx', '-c', nginxConfig(directory, `
upstream server { server ${authority}:8080; keepalive 1; }
server {
	listen 127.0.0.1:${FRONT_PORT};
	proxy_http_version 1.1; proxy_set_header Connection ""; proxy_request_buffering off; client_body_buffer_size 4k; proxy_buffer_size 1k; proxy_buffers 8 4k;
	location / { proxy_pass http://server; }
}`)]);

		const results = [];
		for (const [name, base] of [['server', `http://${authority}:8080`], ['front', `http://127.0.0.1:${FRONT_PORT}`]] as const) {
			makeDirectory(received, name);
			const transfer = (...options: string[]) => ['--silent', '--show-error', '--fail', '-H', `@${header}`, '-w', '%{http_code} %{num_connects}\n', ...options];
			const down = (what: string, as: string) => transfer(`${base}/files/${what}`, '-o', path.join(received, name, as));
			const up = (what: string) => transfer('-T', path.join(server, 'to-upload', what), `${base}/up/${path.basename(directory)}/${name}/`);
			const all = `[1-${REQUESTS}]`;
			const transfers = [down(all, '#1'), up(all), down('large', 'large'), up('large'), down(all, 'again-#1'), up(all)];
			const words = transfers.flatMap((options, index) => index === 0 ? options : ['--next', ...options]);
			results.push(await done(pod, 'curl', ...words), sha256OfEach(path.join(received, name)), sha256OfEach(path.join(server, 'up', path.basename(directory), name)));
		}

		return results;
	},
};

async function startRedis(far: Pod): Promise<void> {
	await started(far, 6379, ['redis-server', '--port', '6379', '--bind', '0.0.0.0', '::', '--protected-mode', 'no', '--save', '', '--enable-debug-command', 'yes']);
}

const redisCli = (pod: Pod, host: string) => async (...words: readonly string[]) => done(pod, 'redis-cli', '-h', host, ...words);

/** Values longer than what is redirected, pipelined, so that its connections come and go between both. */
const redis: Program = {
	redirected: 10_000,
	family: 6,
	async serve(far) {
		await startRedis(far);
	},
	async use({pod, host}) {
		const cli = redisCli(pod, host);
		const bench = async (...words: string[]) => {
			await done(pod, 'redis-benchmark', '-h', host, '-q', ...words);
		};

		await cli('flushall');
		await bench('-n', '5000', '-c', '4', '-t', 'set,get,incr,lpush,rpop,hset,mset');
		await bench('-n', '20000', '-c', '4', '-P', '16', '-t', 'set,get,incr,lpush,rpop,hset,mset,lrange_100');
		await bench('-n', '2000', '-c', '4', '-P', '16', '-d', '3000', '-t', 'set,get,lpush,lrange_100');
		return Promise.all([cli('get', 'counter:__rand_int__'), cli('llen', 'mylist'), cli('dbsize'), cli('debug', 'digest')]);
	},
};

/** PostgreSQL does not run as root, and wants a user with a name: nobody. */
const POSTGRES: As = {uid: 65_534, gid: 65_534};

const postgres: Program = {
	redirected: 3000,
	family: 4,
	async serve(far, directory) {
		const programs = readdirSync('/usr/lib/postgresql').map(version => `/usr/lib/postgresql/${version}/bin`).find(bin => existsSync(path.join(bin, 'initdb')))!;
		const data = makeDirectory(directory, 'data');
		chownSync(data, POSTGRES.uid!, POSTGRES.gid!);
		const {code, stderr} = far.run([`${programs}/initdb`, '-D', data, '-U', 'app', '-A', 'trust', '--no-sync', '--locale', 'C'], POSTGRES);
		if (code !== 0) {
			throw new Error(stderr);
		}

		write(data, 'pg_hba.conf', 'host all all all trust\n');
		await started(far, 5432, [`${programs}/postgres`, '-D', data, '-c', 'listen_addresses=*', '-c', 'unix_socket_directories=', '-c', 'fsync=off', '-c', 'synchronous_commit=off'], POSTGRES);
		await eventually('it takes connections', () => far.run(['pg_isready', '-h', far.ipv4]).code === 0);
	},
	async use({pod, host, directory}) {
		const at = ['-h', host, '-U', 'app', 'postgres'];
		await done(pod, 'pgbench', '-i', '-q', ...at);
		const simple = await done(pod, 'pgbench', '-n', '-c', '4', '-t', '150', '--random-seed', '7', ...at);
		const prepared = await done(pod, 'pgbench', '-n', '-c', '2', '-t', '150', '-M', 'prepared', '--random-seed', '8', ...at);
		// On one connection that has become chatty before.
		const out = path.join(directory, 'out');
		const script = write(directory, 'script.sql', [
			...Array.from({length: 100}, (_, index) => `select ${index}, sum(length(filler)) from pgbench_tellers;`),
			`\\copy (select *, md5(aid::text) from pgbench_accounts order by aid) to ${out}`,
			'create temporary table copied (like pgbench_accounts); alter table copied add hash text;',
			`\\copy copied from ${out}`,
			'select count(*), sum(aid), sum(abalance), count(*) filter (where hash = md5(aid::text)) from copied;',
			'select repeat(\'0123456789abcdef\', n * 37) from generate_series(1, 1000) n;',
			'select (select sum(abalance) from pgbench_accounts), (select sum(bbalance) from pgbench_branches), (select sum(tbalance) from pgbench_tellers), (select sum(delta) from pgbench_history), (select count(*) from pgbench_history);',
		].join('\n'));
		const answers = await done(pod, 'psql', '-X', '-q', '-At', '-v', 'ON_ERROR_STOP=1', '-f', script, ...at);
		return [/actually processed: .*/.exec(simple)?.[0], /actually processed: .*/.exec(prepared)?.[0], sha256(out), answers];
	},
};

const WEB = fileURLToPath(new URL('../helpers/web-child.js', import.meta.url));

const LARGE_ECHOES = 3;

/** Sends back what it is sent, while more comes. */
const node: Program = {
	redirected: 100,
	family: 6,
	async serve(far, directory) {
		write(directory, 'large', randomBytes(LARGE_BYTES));
		await started(far, 8080, [process.execPath, WEB, 'serve', '8080']);
	},
	async use({pod, authority, directory}) {
		const answers = await done(pod, process.execPath, WEB, 'ask', `http://${authority}:8080`, '1000', '40000');
		const back = path.join(directory, 'back');
		const echoes = [];
		for (let echo = 0; echo < LARGE_ECHOES; echo++) {
			await done(pod, 'curl', '--silent', '--show-error', '--fail', '-T', path.join(directory, '../large'), '-o', back, `http://${authority}:8080/`);
			echoes.push(sha256(back));
		}

		return [answers, echoes];
	},
};

const PROGRAMS = {nginx, redis, postgres, node};

/** Enrolled for its address to be known, so that its connections with the proxies are pairs, too; nothing of it is captured. */
const serverEntry = (far: Pod) => ({name: 'test/far', netns: far.netns, mode: 'ambient', dns: false, annotations: {'ambient.istio.io/bypass-inbound-capture': 'true'}});

const rowOf = (pod: Pod) => pod.world.json<PodRow[]>('pods').find(({name}) => name === `test/${pod.name}`)!;

/** Messages so far: by application and proxy, by the proxy to the application, by the server to the proxies. */
function redirectedMessages(pod: Pod, far: Pod): readonly number[] {
	const {sentByClient, sentByServer} = rowOf(pod).acceleration;
	return [sentByClient, sentByServer, rowOf(far).acceleration.sentByServer].map(({redirected}) => redirected.messages);
}

/** Pods with a proxy each, by the proxies' names. */
async function proxiedPods(world: World): Promise<readonly Pod[]> {
	const pods = [];
	for (const [name, start] of Object.entries(PROXIES)) {
		const pod = world.pod(name);
		await start(pod);
		pods.push(pod);
	}

	return pods;
}

async function sameThroughProxies(t: ExecutionContext, {serve, use, redirected, family}: Program): Promise<void> {
	const world = World.create(t);
	const far = world.pod('far');
	const direct = world.pod('direct');
	const directory = makeDirectory(world.directory, 'program');
	const userIn = (pod: Pod, itsFamily: 4 | 6): User => {
		const host = itsFamily === 4 ? far.ipv4 : far.ipv6;
		return {pod, host, authority: itsFamily === 4 ? host : `[${host}]`, directory: makeDirectory(directory, pod.name)};
	};

	await serve(far, directory);
	const expected = await use(userIn(direct, 4));
	const pods = await proxiedPods(world);
	await world.agent([serverEntry(far), ...pods.map(pod => podEntry(pod))], ['--acceleration', 'on']);
	for (const pod of pods) {
		const before = redirectedMessages(pod, far);
		t.deepEqual(await use(userIn(pod, pod.name === 'envoy' ? family : 4)), expected, pod.name);
		const messages = redirectedMessages(pod, far).map((count, hop) => count - before[hop]!);
		t.true(messages.every(count => count >= redirected), `${pod.name}: ${messages.join(', ')} messages redirected`);
		t.log(`${pod.name}: ${messages.join(', ')} messages redirected`);
	}
}

for (const [name, program] of Object.entries(PROGRAMS)) {
	test.serial(`${name} through an accelerated HAProxy and Envoy: the same as without`, sameThroughProxies, program);
}

test.serial('redis-cli, which blocks, is left to TCP before either proxy, and counted', async t => {
	const world = World.create(t);
	const far = world.pod('far');
	await startRedis(far);
	const pods = await proxiedPods(world);

	// Without `far`: the proxies' connections to it are none of a pair.
	await world.agent(pods.map(pod => podEntry(pod)), ['--acceleration', 'on']);
	for (const pod of pods) {
		const cli = pod.start(['redis-cli', '-h', far.ipv4]);
		cli.child.stdin!.write(`incr ${pod.name}\n`.repeat(200));
		await cli.until('all answers', () => cli.stdout.endsWith('\n200\n'));
		t.is(cli.stdout, Array.from({length: 200}, (_, index) => `${index + 1}\n`).join(''));
		await eventually('the agent has looked at it', () => rowOf(pod).reasons['unaccelerated_blocking'] === 1);
		const {acceleration} = rowOf(pod);
		t.is(acceleration.sentByClient.redirected.messages + acceleration.sentByServer.redirected.messages, 0);
	}
});
