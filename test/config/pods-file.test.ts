import test from 'ava';
import {parsePodsFile} from '../../src/config/pods-file.js';
import {InputError} from '../../src/errors.js';
import type {Capture} from '../../src/redirect/capture.js';

const GOOD = {name: 'shop/web-0', netns: '/run/netns/web', proxy: {port: 15_001}};

test('a whole entry is read, and what is left out has its default', t => {
	const [full, least] = parsePodsFile(`
pods:
  - name: shop/web-0
    pid: 4711
    ips: [10.0.0.2, "FD00:0::2"]
    mode: proxy
    proxy: {port: 15001, addresses: [10.0.0.9]}
    exempt:
      marks: [0x539/0xfff, 7, "0x10"]
      uids: [1337]
      gids: [0]
      cgroups: [/sys/fs/cgroup/proxy]
  - name: least
    netns: /run/netns/least
    proxy: {port: 1}
`, 'pods.yaml');
	t.deepEqual(full, {
		name: 'shop/web-0', pid: 4711, ips: ['10.0.0.2', 'fd00::2'],
		wish: {
			warnings: [],
			capture: {
				mode: 'proxy',
				exempt: {marks: [{value: 0x539, mask: 0xfff}, {value: 7, mask: 0xff_ff_ff_ff}, {value: 16, mask: 0xff_ff_ff_ff}], uids: [1337], gids: [0], cgroups: ['/sys/fs/cgroup/proxy']},
				outbound: {port: 15_001, addresses: ['10.0.0.9'], excludePorts: [], includePorts: [], excludeRanges: [], includeRanges: '*'},
				keepSource: false, excludeInterfaces: [], acceleration: 'auto',
			},
		},
	});
	const {capture} = least!.wish as {capture: Capture};
	t.deepEqual([capture.outbound.port, capture.outbound.addresses, capture.exempt], [1, undefined, {marks: [], uids: [], gids: [], cgroups: []}]);
	t.deepEqual(parsePodsFile('pods: []', 'x'), []);
});

const refused = test.macro({
	exec(t, pods: unknown, message: string | RegExp) {
		t.throws(() => parsePodsFile(JSON.stringify(pods), 'pods.yaml'), {instanceOf: InputError, message});
	},
	title: (title = '') => `refused: ${title}`,
});
const pod = (extra: object) => ({pods: [{...GOOD, ...extra}]});

test('no pods', refused, {}, 'pods.yaml: pods: expected a list, got nothing');
test('a list at the top', refused, [], 'pods.yaml: expected a mapping with pods, got a list');
test('an unknown key at the top', refused, {pods: [], pod: 1}, 'pods.yaml: \'pod\' is not known here; known are pods');
test('a pod that is text', refused, {pods: ['x']}, /^pods\.yaml: pods\[0]: expected a mapping with name, .*, got "x"$/);
test('an unknown key of a pod', refused, pod({netnss: 'x'}), /'netnss' is not known here/);
test('no name', refused, pod({name: undefined}), 'pods.yaml: pods[0].name: expected text, got nothing');
test('a name that is a number', refused, pod({name: 3}), 'pods.yaml: pods[0].name: expected text, got 3');
test('a name with a space', refused, pod({name: 'a b'}), /expected letters, digits/);
test('a name that is too long', refused, pod({name: 'x'.repeat(320)}), /at most 319/);
test('the same name twice', refused, {pods: [GOOD, {...GOOD, netns: '/x'}]}, 'pods.yaml: pods[1].name: \'shop/web-0\' is also the name of pods[0]');
test('neither netns nor pid', refused, pod({netns: undefined}), 'pods.yaml: pods[0]: expected exactly one of netns and pid');
test('netns and pid', refused, pod({pid: 1}), 'pods.yaml: pods[0]: expected exactly one of netns and pid');
test('a relative netns', refused, pod({netns: 'web'}), 'pods.yaml: pods[0].netns: expected an absolute path, got "web"');
test('a pid of 0', refused, pod({netns: undefined, pid: 0}), /pods\[0]\.pid: expected an integer from 1 to 4194304, got 0/);
test('a pid that is text', refused, pod({netns: undefined, pid: '1'}), /pods\[0]\.pid: expected an integer/);
test('ips that are text', refused, pod({ips: '10.0.0.2'}), 'pods.yaml: pods[0].ips: expected a list, got "10.0.0.2"');
test('no ips', refused, pod({ips: []}), 'pods.yaml: pods[0].ips: expected at least one address');
test('an ip that is none', refused, pod({ips: ['10.0.0.256']}), 'pods.yaml: pods[0].ips[0]: expected an IP address, got "10.0.0.256"');
test('two ips of one family', refused, pod({ips: ['10.0.0.1', '10.0.0.2']}), 'pods.yaml: pods[0].ips: expected at most one IPv4 address');
test('an unspecified ip', refused, pod({ips: ['::']}), /expected an address that a connection can go to/);
test('an unknown mode', refused, pod({mode: 'tproxy'}), 'pods.yaml: pods[0].mode: expected proxy or ambient or sidecar or auto, got "tproxy"');
test('no proxy', refused, pod({proxy: undefined}), 'pods.yaml: pods[0].proxy: expected a mapping with port, addresses, got nothing');
test('a proxy that is text', refused, pod({proxy: ':15001'}), /pods\[0]\.proxy: expected a mapping/);
test('a port of 0', refused, pod({proxy: {port: 0}}), /pods\[0]\.proxy\.port: expected an integer from 1 to 65535, got 0/);
test('a port with a fraction', refused, pod({proxy: {port: 1.5}}), /pods\[0]\.proxy\.port: expected an integer/);
test('a proxy address with a port', refused, pod({proxy: {port: 1, addresses: ['10.0.0.1:80']}}), /pods\[0]\.proxy\.addresses\[0]: expected an IP address/);
test('two proxy addresses of one family', refused, pod({proxy: {port: 1, addresses: ['::1', 'fd00::1']}}), /expected at most one IPv6 address/);
test('an unknown key of exempt', refused, pod({exempt: {uid: [1]}}), /'uid' is not known here/);
test('marks that are no list', refused, pod({exempt: {marks: '0x539'}}), /exempt\.marks: expected a list/);
test('a mark that is a word', refused, pod({exempt: {marks: ['many']}}), 'pods.yaml: pods[0].exempt.marks[0]: expected a mark such as 0x539 or 0x539/0xfff, got "many"');
test('a mark of 33 bits', refused, pod({exempt: {marks: ['4294967296']}}), /expected a mark/);
test('a mask of 0', refused, pod({exempt: {marks: ['0/0']}}), /a mask of 0 would exempt every connection/);
test('a mark outside its mask', refused, pod({exempt: {marks: ['0x539/0xff']}}), /0x539 has bits outside its mask 0xff, so it can never match/);
test('five marks', refused, pod({exempt: {marks: [1, 2, 3, 4, 5]}}), /at most 4 are possible/);
test('a negative uid', refused, pod({exempt: {uids: [-1]}}), /exempt\.uids\[0]: expected an integer from 0 to 4294967294, got -1/);
test('a gid that is a name', refused, pod({exempt: {gids: ['root']}}), /exempt\.gids\[0]: expected an integer/);
test('a relative cgroup', refused, pod({exempt: {cgroups: ['proxy']}}), /exempt\.cgroups\[0]: expected an absolute path/);

test('refused with line and column: YAML that is none', t => {
	t.throws(() => parsePodsFile('pods:\n  - name: "x\n', 'pods.yaml'), {instanceOf: InputError, message: /^pods\.yaml:\d+:\d+: /});
	t.throws(() => parsePodsFile('pods: []\npods: []\n', 'pods.yaml'), {instanceOf: InputError, message: /^pods\.yaml:2:1: .*unique/});
});

test('refused: aliases that grow without bound', t => {
	const bomb = ['a: &a [x,x,x,x,x,x,x,x,x,x]', ...[...'bcdefgh'].map((name, index) => `${name}: &${name} [${Array.from({length: 10}, () => `*${'abcdefgh'[index]}`).join(',')}]`)].join('\n');
	t.throws(() => parsePodsFile(bomb, 'pods.yaml'), {instanceOf: InputError});
});

const wish = (extra: object) => parsePodsFile(JSON.stringify({pods: [{name: 'shop/web', netns: '/x', ...extra}]}), 'pods.yaml')[0]!.wish;

test('modes of a mesh are read from labels and annotations', t => {
	const ambient = wish({mode: 'ambient', dns: false}) as {capture: Capture};
	t.is(ambient.capture.mode, 'ambient');
	t.is(ambient.capture.dns, undefined);
	const sidecar = wish({mode: 'sidecar', dns: true, proxy: {uid: 7}, annotations: {'traffic.sidecar.istio.io/excludeOutboundPorts': '3306'}}) as {capture: Capture};
	t.deepEqual([sidecar.capture.proxy, sidecar.capture.dns, sidecar.capture.outbound.excludePorts], [{uid: 7, gid: 1337}, {port: 15_053}, [3306]]);
	t.is((wish({mode: 'auto', namespaceLabels: {'istio.io/dataplane-mode': 'ambient'}}) as {capture: Capture}).capture.mode, 'ambient');
	t.regex((wish({mode: 'auto'}) as {leave: string}).leave, /neither it nor its namespace has the label/);
});

test('an annotation that cannot be read refuses its pod, and no other', t => {
	const annotations = {'traffic.sidecar.istio.io/excludeOutboundIPRanges': '10.0.0.0/33'};
	const [bad, good] = parsePodsFile(JSON.stringify({pods: [{name: 'a', netns: '/x', mode: 'sidecar', annotations}, {name: 'b', netns: '/y', mode: 'ambient'}]}), 'x');
	t.regex((bad!.wish as {refused: InputError}).refused.message, /a.*excludeOutboundIPRanges.*10\.0\.0\.0\/33/);
	t.true('capture' in good!.wish);
});

test('an annotation that is no text', refused, pod({mode: 'sidecar', proxy: undefined, annotations: {x: 5}}), 'pods.yaml: pods[0].annotations[\'x\']: expected text, got 5: put it in quotes');
test('annotations of a proxy pod', refused, pod({annotations: {}}), 'pods.yaml: pods[0].annotations: has no meaning in mode proxy');
test('exemptions of an ambient pod', refused, pod({mode: 'ambient', proxy: undefined, exempt: {}}), 'pods.yaml: pods[0].exempt: has no meaning in mode ambient');
test('a proxy port of an ambient pod', refused, pod({mode: 'ambient'}), /pods\[0]\.proxy: 'port' is not known here/);
